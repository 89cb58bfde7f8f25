"""The two commands: `dataprep` (rows -> blocks) and `finetune` (blocks -> tuned model)."""
