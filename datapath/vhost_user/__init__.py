"""The vhost-user back-end: codec, state machine, guest memory, and the socket of one front-end."""
