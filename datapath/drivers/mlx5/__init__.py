"""The vDPA driver for ConnectX-6, 6 Dx and BlueField, through DevX (docs/drivers/mlx5.md)."""
