"""Networks: a dilated ResNet, the heads, and the segmentor that combines them."""
