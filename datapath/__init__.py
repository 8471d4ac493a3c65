"""The data path: vhost-user back-end, vDPA drivers, buses, relays, emulated NICs. Knows no libvirt."""
