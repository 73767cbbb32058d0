"""The stack: the server with its databases, its backup and an Agent, on this machine, out of ``deploy/``."""
