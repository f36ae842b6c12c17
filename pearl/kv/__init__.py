"""Paged KV bookkeeping: host only, no tensors. The draft and the target have one ``KVCacheManager`` each."""

from pearl.kv.held import CacheStats, PageCopy
from pearl.kv.manager import KVCacheManager
from pearl.kv.page_pool import OutOfPages, PagePool, PrefixKey
from pearl.kv.shifted import Shifted

__all__ = ["CacheStats", "KVCacheManager", "OutOfPages", "PageCopy", "PagePool", "PrefixKey", "Shifted"]
