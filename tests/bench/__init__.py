"""What ./bench measures: one module per topic, and what topics are measured and shown with."""
