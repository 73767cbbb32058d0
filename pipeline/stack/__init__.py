"""The stack on this machine: the server, databases, backup and Agent of ``deploy/``."""
