"""How long it takes to plan ten thousand cells of a sweep: nothing is run, no model is read."""

import argparse
import time

from helpers.run.grid import Grid, plan_sweep


def main() -> None:
    """Plan a grid of ten seeds by many shares τ."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    cells = parser.parse_args().cells
    grid = Grid(grid={"SEED": list(range(10)), "adapter.suppress.tau": [0.1 + i / cells for i in range(cells // 10)]})
    start = time.perf_counter()
    plan = plan_sweep("benchmark", grid)
    missing = plan.missing()
    seconds = time.perf_counter() - start
    print(f"{len(plan.cells):,} cells, {len(plan.nodes):,} nodes, {len(missing):,} to run: planned in {seconds:.1f} s")


if __name__ == "__main__":
    main()
