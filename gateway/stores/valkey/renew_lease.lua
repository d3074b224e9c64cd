-- Extends a lease. Does nothing if another replica has taken the lease; commit.lua then refuses the snapshot.
--
-- KEYS    1 the task
-- ARGV    1 token, 2 duration of the lease in microseconds
-- result  {}

if redis.pcall('HGET', KEYS[1], 'holder') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'held_until', text(time_now() + tonumber(ARGV[2])))
  keep(math.ceil(tonumber(ARGV[2]) / 1000))
end
return {}
