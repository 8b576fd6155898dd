-- Adds one entry (node, socket) of a user to a presence channel, and announces the user's first.
--
-- KEYS[1]  hash   user id -> user_info (JSON): the channel's members
-- KEYS[2]  hash   user id -> number of entries
-- KEYS[3]  set    the node's entries, "app channel socket user"
-- KEYS[4]  string the epoch
-- ARGV[1]  the entry
-- ARGV[2]  user id
-- ARGV[3]  user_info
-- ARGV[4]  how many members the channel may have; 0: no limit (an entry is made again)
-- ARGV[5]  pub/sub channel for the announcement; empty: none
-- ARGV[6]  the announcement
-- ARGV[7]  the epoch that the node knows; empty: any
-- ARGV[8]  hook, see webhook_facts.lua
-- ARGV[9]  fact
-- ARGV[10] event; empty: webhooks are not told
--
-- Returns {-2} when the epoch is another one, {-1} when the channel is full, else {1 if the user
-- was no member before, else 0, members as a flat list of user id and user_info}. Who makes an
-- entry again is told of no members: a node does so for each of thousands in one channel.

if ARGV[7] ~= '' and redis.call('GET', KEYS[4]) ~= ARGV[7] then
  return {-2}
end

local limit = tonumber(ARGV[4])
if limit > 0
  and redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0
  and redis.call('HLEN', KEYS[1]) >= limit
then
  return {-1}
end

local first = 0
if redis.call('SADD', KEYS[3], ARGV[1]) == 1
  and redis.call('HINCRBY', KEYS[2], ARGV[2], 1) == 1
then
  first = 1
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])

if first == 1 and ARGV[5] ~= '' then
  redis.call('PUBLISH', ARGV[5], ARGV[6])
end
if first == 1 and ARGV[10] ~= '' then
  hook_came(ARGV[8], ARGV[9], ARGV[10])
end
if limit == 0 then
  return {first, {}}
end
return {first, redis.call('HGETALL', KEYS[1])}
