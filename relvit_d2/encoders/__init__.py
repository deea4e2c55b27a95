"""Images to token maps. Imports torch, torchvision and timm only."""
