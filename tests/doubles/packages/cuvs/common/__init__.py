from .resources import Resources, auto_sync_resources

__all__ = ["Resources", "auto_sync_resources"]
