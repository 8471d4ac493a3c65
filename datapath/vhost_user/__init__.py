"""The vhost-user back-end: codec, state machine and guest memory. Owns no socket."""
