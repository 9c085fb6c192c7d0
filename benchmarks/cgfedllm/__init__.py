"""The benchmark of CG-FedLLM's codecs: gate on held-out snapshots, and loss against bytes."""
