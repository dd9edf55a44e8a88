"""Measurements that anyone can repeat: ``python -m sb3_mbpo.benchmark``."""
