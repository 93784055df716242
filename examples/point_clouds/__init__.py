"""What `point_cloud_outliers.py` is made of: point clouds, a network for them and its training."""
