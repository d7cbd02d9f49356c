"""Programs to read and to run: `python -m examples.plain_pytorch`. Tests run them too."""
