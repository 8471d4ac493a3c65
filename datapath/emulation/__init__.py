"""Emulated NICs: devices that drivers cannot tell from hardware. Nothing here imports a driver."""
