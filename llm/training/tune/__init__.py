"""Training, a stage a file: base_model -> adapter -> trainer -> checkpoints -> export."""
