"""Detection and segmentation with L²ViT as the backbone (Tables 4 and 5 of the paper)."""
