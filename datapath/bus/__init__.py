"""Buses: how a driver reaches its VF. `function.py` owns the interface that all of them fulfil."""
