"""What ./bench measures; one module per subject."""
