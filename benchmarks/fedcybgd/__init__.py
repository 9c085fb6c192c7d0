"""The benchmark of FedCyBGD: loss, bytes, memory and compute beside full tuning and LoRA."""
