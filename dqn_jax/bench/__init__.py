"""Measurements that anybody can repeat: how fast the two drivers are, beside other ways to write the same loop."""
