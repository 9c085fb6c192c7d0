"""FL-GLM and FedSEA-LLaMA: split learning, where first and last layers stay at the site."""
