"""Running the lab: notebooks in order, sweeps, plans, and what is fetched or made before."""
