"""Training rooms: one model at a time (`finetune`) and the 2N paired vaccine variants (`vaccines`)."""
