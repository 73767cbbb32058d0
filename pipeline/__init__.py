"""What the tasks do, one idea a module; data goes one way: settings, fetch, build, smoke, release."""
