"""Pre-trained models: loading them, putting adapter slots on them, PEFT adapters in and out."""
