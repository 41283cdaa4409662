"""Where a model's weights are kept so that each request has them unchanged: mapped, copied, or shared and restored."""
