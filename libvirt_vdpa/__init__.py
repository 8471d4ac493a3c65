"""The control plane: what an operator runs, from domain XML and libvirt hooks to port processes."""
