"""Fine-tuning with a second loss beside the answers': consistent layers, a teacher's attention, an entrapped shift."""
