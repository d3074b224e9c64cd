-- Fails if the server cannot store or publish, for example because it is read-only or out of memory.
--
-- KEYS    1 a key for probes only
-- ARGV    1 publish command, 2 channel
-- result  {now}

redis.call('SET', KEYS[1], '', 'PX', 1000)
redis.call(ARGV[1], ARGV[2], '')
return {now}
