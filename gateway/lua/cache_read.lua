-- Reads a cache channel's last event; of many misses only the first is told.
--
-- KEYS[1]  string the channel's last event, its JSON body
-- KEYS[2]  string stands while a miss has been told and nothing was published since
-- ARGV[1]  how long a miss is not told again, in milliseconds
-- ARGV[2]  hook, see webhook_facts.lua; empty when nobody wants to hear of misses
-- ARGV[3]  event
--
-- Returns the body, false when there is none.

local body = redis.call('GET', KEYS[1])
if not body and ARGV[2] ~= '' and redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[1]) then
  hook_queue(cjson.decode(ARGV[2]), ARGV[3])
end
return body
