-- Extends a lease. A holder whose lease has expired learns it from commit.lua.
--
-- KEYS    the task's three keys (common.lua)
-- ARGV    1 token, 2 duration of the lease in milliseconds
-- result  {now}

if lease_holder() == ARGV[1] then redis.call('PEXPIRE', KEYS[3], ARGV[2]) end
return {now}
