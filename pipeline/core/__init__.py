"""Settings, failures, child processes, output and files of state: what every other folder uses."""
