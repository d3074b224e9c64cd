-- Ends a lease without a snapshot. Does nothing if the lease has another holder.
--
-- KEYS    1 the task
-- ARGV    1 token, 2 encoding of the failure to cache ('': none), 3 how long, in microseconds, 4 channel,
--         5 name of the task
-- result  {}

if redis.pcall('HGET', KEYS[1], 'holder') ~= ARGV[1] then return {} end
redis.call('HDEL', KEYS[1], 'holder', 'held_until')
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'failure', ARGV[2], 'failed_until', text(time_now() + tonumber(ARGV[3])))
  keep(math.ceil(tonumber(ARGV[3]) / 1000))
end
redis.call('PUBLISH', ARGV[4], 'E' .. ARGV[5])
return {}
