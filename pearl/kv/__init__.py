"""Paged KV cache bookkeeping with rollback and prefix caching."""

from pearl.kv.manager import KVCacheManager, PageCopy, PrefixStats
from pearl.kv.page_pool import OutOfPages

__all__ = ["KVCacheManager", "OutOfPages", "PageCopy", "PrefixStats"]
__all__ = ["KVCacheManager", "OutOfPages", "PageCopy", "PrefixStats"]
