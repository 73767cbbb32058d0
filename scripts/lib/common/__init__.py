"""What status, memory and backup share: settings from the environment, databases, Datadog."""
