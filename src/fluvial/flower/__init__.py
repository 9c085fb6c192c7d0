"""Flower: the same run over processes and machines. Only this folder imports flwr."""
