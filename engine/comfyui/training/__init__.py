"""One LoRA run inside the host: what it is told, what it does, what it leaves behind."""
