-- Reads a cache channel's last event; of many misses only the first is to be told.
--
-- KEYS[1]  string the channel's last event, its JSON body
-- KEYS[2]  string stands while a miss has been told and nothing was published since
-- ARGV[1]  how long a miss is not told again, in milliseconds
--
-- Returns {body, 0}, or {false, 1 if this miss is to be told, else 0}.

local body = redis.call('GET', KEYS[1])
if body then
  return {body, 0}
end
if redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[1]) then
  return {false, 1}
end
return {false, 0}
