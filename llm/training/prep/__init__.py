"""Data preparation, a stage a file: dataset -> encode -> pack -> write."""
