"""The version, for files that have to know what made them."""

VERSION = "0.1.0"
