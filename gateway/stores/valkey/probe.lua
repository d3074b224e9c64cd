-- Fails if the server cannot store or publish, for example because it is read-only or out of memory.
--
-- KEYS    1 a key for this script only
-- ARGV    1 a channel without subscribers
-- result  {}

redis.call('SET', KEYS[1], '', 'PX', 1000)
redis.call('PUBLISH', ARGV[1], '')
return {}
