"""What the tasks do. Imports go one way: core, engines, inputs, image, then the others."""
