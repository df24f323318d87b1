"""Training: one model at a time (`finetune`), or many adapters over one frozen base (`multi_lora`)."""
