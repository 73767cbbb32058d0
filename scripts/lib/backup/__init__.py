"""Backup and restore of what the server would be missed for; ``scripts/backup`` is the command."""
