-- Writes how many connections a node has for some names of one app; tells and publishes what
-- changes in the sums over all nodes.
--
-- KEYS[1]  hash   the node's numbers: "app name" -> number
-- KEYS[2]  hash   the app's sums: name -> sum; names without connections are not in it
-- KEYS[3]  hash   name -> "ms count", when its count was published last, and which
-- KEYS[4]  zset   node -> end of its lease, in milliseconds of Redis' clock
-- KEYS[5]  string the epoch
-- ARGV[1]  app
-- ARGV[2]  the node whose lease must have run out, when a survivor removes its numbers; else empty
-- ARGV[3]  the epoch that the node knows; empty: any
-- ARGV[4]  when numbers are written again: '1' to publish nothing and tell webhooks of nothing, '2' to
--          publish nothing; else empty
-- ARGV[5]  a count up to which every change is published at once
-- ARGV[6]  milliseconds between two publications of a count above it
-- ARGV[7]  hook of channel_occupied, see webhook_facts.lua
-- ARGV[8]  hook of subscription_count
-- ARGV[9…] five for each name:
--          name
--          number, 0 for none
--          pub/sub channel for what is published about it; empty: nothing is
--          publication of 0 to more; of a count: all that stands before the number
--          publication of back to 0; of a count: all that stands behind the number, after '#'
--
-- Returns {-2} when the epoch is another one, {-1} when the node is alive after all, else
-- {0, then three for each name}: the sum before, the sum now, and
-- -1 when its count was published, milliseconds to wait when it is to be published later, else 0.

if ARGV[3] ~= '' and redis.call('GET', KEYS[5]) ~= ARGV[3] then
  return {-2}
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if ARGV[2] ~= '' then
  local lease = redis.call('ZSCORE', KEYS[4], ARGV[2])
  if lease and tonumber(lease) > now then
    return {-1}
  end
end

local quiet, untold = ARGV[4] ~= '', ARGV[4] == '1'
local at_once, pause = tonumber(ARGV[5]), tonumber(ARGV[6])

-- The published count follows the sum; returns the third number of the answer.
local function show(name, sum, target, head, tail)
  if sum == 0 then
    redis.call('HDEL', KEYS[3], name)
    return 0
  end
  local shown = redis.call('HGET', KEYS[3], name)
  if shown then
    local at, count = string.match(shown, '^(%d+) (%d+)$')
    if tonumber(count) == sum then
      return 0
    end
    local wait = tonumber(at) + pause - now
    if sum > at_once and wait > 0 then
      return wait
    end
  end
  redis.call('HSET', KEYS[3], name, string.format('%d %d', now, sum))
  local count = string.format('%d', sum)
  redis.call('PUBLISH', target, head .. count .. tail)
  if ARGV[8] ~= '' then
    local event = '{"name":"subscription_count","channel":"' .. name .. '","subscription_count":'
    hook_queue(cjson.decode(ARGV[8]), event .. count .. '}')
  end
  return -1
end

local answer = {0}
for index = 9, #ARGV, 5 do
  local name, number, target = ARGV[index], tonumber(ARGV[index + 1]), ARGV[index + 2]
  local first, last = ARGV[index + 3], ARGV[index + 4]
  local entry = ARGV[1] .. ' ' .. name
  local known = tonumber(redis.call('HGET', KEYS[1], entry) or 0)
  local before = tonumber(redis.call('HGET', KEYS[2], name) or 0)
  local sum = before + number - known
  if number ~= known then
    if number == 0 then
      redis.call('HDEL', KEYS[1], entry)
    else
      redis.call('HSET', KEYS[1], entry, number)
    end
    if sum == 0 then
      redis.call('HDEL', KEYS[2], name)
    else
      redis.call('HSET', KEYS[2], name, sum)
    end
  end

  local shown = 0
  if target ~= '' and not quiet then
    if string.sub(last, 1, 1) == '#' then
      shown = show(name, sum, target, first, string.sub(last, 2))
    elseif before == 0 and sum > 0 then
      redis.call('PUBLISH', target, first)
    elseif before > 0 and sum == 0 then
      redis.call('PUBLISH', target, last)
    end
  end
  -- A channel's name has no letter that JSON would escape; '#' are the users' own.
  if ARGV[7] ~= '' and not untold and string.sub(name, 1, 1) ~= '#' then
    if before == 0 and sum > 0 then
      local event = '{"name":"channel_occupied","channel":"' .. name .. '"}'
      hook_came(ARGV[7], ARGV[1] .. ' channel_vacated ' .. name .. ' ', event)
    elseif before > 0 and sum == 0 then
      hook_left(ARGV[7], ARGV[1] .. ' channel_vacated ' .. name .. ' ')
    end
  end
  answer[#answer + 1] = before
  answer[#answer + 1] = sum
  answer[#answer + 1] = shown
end
return answer
