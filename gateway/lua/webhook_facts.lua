-- Put in front of every script that changes what webhooks tell of, so that a change and its record
-- are one step. What a script passes on:
--
-- hook   JSON, empty when the app has no webhook for it:
--        {"due": zset queue -> when it may be sent, "leaving": zset fact -> when it counts,
--         "dropped": hash queue -> events that did not fit, "queues": streams to write to,
--         "after_ms": how long an end waits for a return}
-- fact   the end that a coming takes back, "app event channel user"
-- event  JSON, as the backend gets it

local HOOK_EVENTS_MOST = 10000
-- What nobody has fetched for a day nobody will: its endpoint is gone from the apps.
local HOOK_KEPT_MS = 86400000

local function hook_now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function hook_queue(hook, event)
  for _, queue in ipairs(hook.queues) do
    redis.call('XADD', queue, '*', 'e', event)
    -- The bound of XADD itself would not say how many it drops.
    local dropped = redis.call('XTRIM', queue, 'MAXLEN', '~', HOOK_EVENTS_MOST)
    if dropped > 0 then
      redis.call('HINCRBY', hook.dropped, queue, dropped)
    end
    redis.call('PEXPIRE', queue, HOOK_KEPT_MS)
    -- NX: a queue that is being sent, or waits to be sent again, keeps its time.
    redis.call('ZADD', hook.due, 'NX', hook_now(), queue)
  end
end

-- Something has come: that takes back its end, if it still waits; else it is told at once.
local function hook_came(text, fact, event)
  if text == '' then
    return
  end
  local hook = cjson.decode(text)
  if redis.call('ZREM', hook.leaving, fact) == 0 then
    hook_queue(hook, event)
  end
end

-- Something has ended, which is told unless it comes back soon.
local function hook_left(text, fact)
  if text == '' then
    return
  end
  local hook = cjson.decode(text)
  redis.call('ZADD', hook.leaving, hook_now() + hook.after_ms, fact)
end
