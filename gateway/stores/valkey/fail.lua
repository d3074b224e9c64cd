-- Stores and publishes a failure, and ends the lease. Does nothing if the lease has another holder.
--
-- KEYS    the task's three keys (common.lua)
-- ARGV    1 token, 2 milliseconds to cache the failure, 3 encoding ('': no failure, only end the lease),
--         4 publish command, 5 channel, 6 subject
-- result  {now}

if lease_holder() ~= ARGV[1] then return {now} end
redis.call('DEL', KEYS[3])
if ARGV[3] == '' then
  redis.call(ARGV[4], ARGV[5], 'R' .. ARGV[6])
else
  redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
  redis.call(ARGV[4], ARGV[5], 'F' .. ARGV[6] .. ARGV[2] .. '\n' .. ARGV[3])
end
return {now}
