use super::*;

fn schedule(windows: &[&str], zone: &str) -> Schedule {
    let windows = windows.iter().map(|window| window.parse().expect("a window")).collect();
    Schedule::new(windows, zone.parse().expect("a zone")).expect("some windows")
}

fn time(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

#[test]
fn eight_hours_a_night_take_the_calendar_date_that_a_hand_would_count() {
    // 1,000,000 s at 28,800 s a night: 34 whole nights and 20,800 s.
    let finish = schedule(&["22:00-06:00"], "Asia/Seoul")
        .finish(time("2026-11-22T12:00:00+09:00"), Duration::from_secs(1_000_000));
    assert_eq!(finish, Some(time("2026-12-27T03:46:40+09:00")));
}

#[test]
fn a_window_across_midnight_is_open_on_both_sides() {
    let nights = schedule(&["23:00-02:00"], "UTC");
    let margin = Duration::from_secs(5);
    for open in ["2026-01-01T23:00:00Z", "2026-01-02T00:30:00Z", "2026-01-02T01:59:54Z"] {
        assert_eq!(nights.next_opening(time(open), margin), time(open));
    }
    for closed in ["2026-01-02T01:59:55Z", "2026-01-02T02:00:00Z", "2026-01-02T12:00:00Z"] {
        assert_eq!(nights.next_opening(time(closed), margin), time("2026-01-02T23:00:00Z"));
    }
}

#[test]
fn nights_of_clock_changes_have_their_real_length() {
    let nights = schedule(&["01:00-06:00"], "Europe/Berlin");
    // In spring 02:00 becomes 03:00: four hours; in autumn six.
    let spring = nights.finish(time("2026-03-28T12:00:00Z"), Duration::from_secs(4 * 3600 + 60));
    assert_eq!(spring, Some(time("2026-03-30T01:01:00+02:00")));
    let autumn = nights.finish(time("2026-10-24T12:00:00Z"), Duration::from_secs(6 * 3600));
    assert_eq!(autumn, Some(time("2026-10-25T06:00:00+01:00")));
}

#[test]
fn a_window_round_the_clock_is_always_open() {
    for text in ["00:00-24:00", "00:00-00:00", "09:00-09:00"] {
        let always = schedule(&[text], "UTC");
        let now = time("2026-05-05T00:00:00Z");
        assert_eq!(always.next_opening(now, Duration::from_secs(5)), now, "{text}");
        assert_eq!(always.finish(now, Duration::from_secs(1_000_000)), Some(time("2026-05-16T13:46:40Z")));
    }
}

#[test]
fn several_windows_a_day_are_used_in_order() {
    let two = schedule(&["12:00-13:00", "01:00-02:00"], "UTC");
    let finish = two.finish(time("2026-01-01T00:00:00Z"), Duration::from_secs(2 * 3600));
    assert_eq!(finish, Some(time("2026-01-01T13:00:00Z")));
}

#[test]
fn a_window_shorter_than_a_call_never_opens() {
    let short = schedule(&["01:00-01:01"], "UTC");
    let opens = short.next_opening(time("2026-01-01T00:00:00Z"), Duration::from_secs(120));
    assert_eq!(opens, Timestamp::MAX);
}

#[test]
fn nonsense_is_refused() {
    for bad in ["", "01:00", "25:00-26:00", "1-2", "01:00-06:61"] {
        assert!(bad.parse::<Window>().is_err(), "{bad}");
    }
    assert!("Moon/Crater".parse::<TimeZoneName>().is_err());
}

#[test]
fn a_window_that_ends_in_the_hour_that_is_left_out_ends_there() {
    // In Berlin 02:00 becomes 03:00 at 01:00 UTC.
    let until = schedule(&["01:00-02:30"], "Europe/Berlin");
    let day = (time("2026-03-29T00:00:00+01:00"), time("2026-03-30T00:00:00+02:00"));
    assert_eq!(until.open_time(day.0, day.1), Duration::from_secs(3600));
    let next = until.next_opening(time("2026-03-29T03:10:00+02:00"), Duration::from_secs(5));
    assert_eq!(next, time("2026-03-30T01:00:00+02:00"));
    let since = schedule(&["02:30-05:00"], "Europe/Berlin");
    let next = since.next_opening(day.0, Duration::from_secs(5));
    assert_eq!(next, time("2026-03-29T03:00:00+02:00"));
    // A window within that hour has no night at all.
    let within = schedule(&["02:15-02:45"], "Europe/Berlin");
    assert_eq!(within.open_time(day.0, day.1), Duration::ZERO);
    assert_eq!(within.next_opening(day.0, Duration::from_secs(5)), time("2026-03-30T02:15:00+02:00"));
}

#[test]
fn a_window_that_begins_or_ends_in_the_hour_that_comes_twice_follows_the_clock() {
    let day = (time("2026-10-25T00:00:00+02:00"), time("2026-10-26T00:00:00+01:00"));
    let since = schedule(&["02:30-05:00"], "Europe/Berlin");
    // From 02:30 to 03:00 of summer time, and from 02:30 to 05:00 of winter time.
    assert_eq!(since.open_time(day.0, day.1), Duration::from_secs(3 * 3600));
    let next = since.next_opening(time("2026-10-25T02:05:00+01:00"), Duration::from_secs(5));
    assert_eq!(next, time("2026-10-25T02:30:00+01:00"));
    let until = schedule(&["01:00-02:30"], "Europe/Berlin");
    assert_eq!(until.open_time(day.0, day.1), Duration::from_secs(2 * 3600));
}

#[test]
fn open_time_is_what_lies_between() {
    let nights = schedule(&["22:00-06:00"], "Asia/Seoul");
    let open = |from: &str, to: &str| nights.open_time(time(from), time(to)).as_secs();
    assert_eq!(open("2026-11-22T12:00:00+09:00", "2026-11-29T12:00:00+09:00"), 7 * 8 * 3600);
    assert_eq!(open("2026-11-22T23:00:00+09:00", "2026-11-23T01:30:00+09:00"), 9000);
    assert_eq!(open("2026-11-22T05:00:00+09:00", "2026-11-22T22:01:00+09:00"), 3660);
    assert_eq!(open("2026-11-22T12:00:00+09:00", "2026-11-22T13:00:00+09:00"), 0);
    assert_eq!(open("2026-11-23T01:00:00+09:00", "2026-11-22T23:00:00+09:00"), 0);
}

#[test]
fn windows_that_overlap_are_counted_once() {
    let from = time("2026-01-01T00:00:00Z");
    for windows in [
        &["00:00-24:00", "01:00-03:00"][..],
        &["09:00-09:00", "10:00-12:00"],
        &["22:00-06:00", "05:00-22:30"],
    ] {
        let always = schedule(windows, "UTC");
        for days in [1, 2, 3, 10, 30] {
            let length = SignedDuration::from_hours(24 * days);
            let to = from.checked_add(length).expect("a time");
            assert_eq!(always.open_time(from, to), length.unsigned_abs(), "{windows:?}");
            assert_eq!(always.finish(from, length.unsigned_abs()), Some(to), "{windows:?}");
            assert_eq!(always.next_opening(to, Duration::from_secs(3600)), to, "{windows:?}");
        }
    }
}

/// Zones and a noon before their clocks change: by an hour at night and at midnight, by half an
/// hour, and not at all any more.
const CHANGES: [(&str, &str); 10] = [
    ("Europe/Berlin", "2026-03-27T12:00:00Z"),
    ("Europe/Berlin", "2026-10-23T12:00:00Z"),
    ("America/New_York", "2026-03-06T12:00:00Z"),
    ("America/New_York", "2026-10-30T12:00:00Z"),
    ("America/Sao_Paulo", "2018-11-02T12:00:00Z"),
    ("America/Sao_Paulo", "2018-02-16T12:00:00Z"),
    ("Australia/Lord_Howe", "2026-04-03T12:00:00Z"),
    ("Asia/Seoul", "1988-05-07T12:00:00Z"),
    ("Asia/Seoul", "2026-03-27T12:00:00Z"),
    ("UTC", "2026-12-30T12:00:00Z"),
];

const WINDOWS: [&[&str]; 8] = [
    &["01:00-06:00"],
    &["22:00-06:00"],
    &["02:30-05:00"],
    &["01:00-02:30"],
    &["23:30-00:30"],
    &["00:00-00:20", "00:40-01:00"],
    &["12:00-13:00", "02:15-02:45", "23:00-23:45"],
    &["20:00-03:00", "01:30-04:00", "04:00-04:10"],
];

/// Whether the clock on the wall shows a time within a window.
fn is_open(windows: &[&str], zone: &TimeZone, at: Timestamp) -> bool {
    let clock = at.to_zoned(zone.clone()).time();
    windows.iter().map(|window| window.parse::<Window>().expect("a window")).any(|window| {
        if window.start < window.end {
            window.start <= clock && clock < window.end
        } else {
            window.start <= clock || clock < window.end
        }
    })
}

/// All borders lie on whole minutes, so a minute is open or closed as a whole.
#[test]
fn openings_are_those_of_the_clock_on_the_wall_minute_by_minute() {
    const MINUTES: usize = 4 * 24 * 60;
    let margin = Duration::from_secs(5);
    for (name, first) in CHANGES {
        let zone = TimeZone::get(name).expect("a zone");
        for windows in WINDOWS {
            let schedule = schedule(windows, name);
            let minute = |number: usize| {
                let number = i64::try_from(number).expect("small");
                time(first).checked_add(SignedDuration::from_mins(number)).expect("a time")
            };
            let open: Vec<bool> =
                (0..MINUTES).map(|number| is_open(windows, &zone, minute(number))).collect();
            let expected = open.iter().filter(|open| **open).count() * 60;
            let found = schedule.open_time(minute(0), minute(MINUTES)).as_secs();
            assert_eq!(found, u64::try_from(expected).expect("small"), "{name} {first} {windows:?}");
            for number in (0..MINUTES).step_by(7) {
                let Some(next) = (number..MINUTES).find(|number| open[*number]) else { break };
                let found = schedule.next_opening(minute(number), margin);
                assert_eq!(found, minute(next), "{windows:?} from {} in {name}", minute(number));
            }
            // In the last seconds of an opening no call leaves any more.
            for number in (1..MINUTES).filter(|number| open[number - 1] && !open[*number]) {
                let late = minute(number).checked_sub(SignedDuration::from_secs(4)).expect("a time");
                let found = schedule.next_opening(late, margin);
                assert!(
                    found >= minute(number) && is_open(windows, &zone, found),
                    "{late} {name} {windows:?}"
                );
            }
        }
    }
}

#[test]
fn work_is_finished_when_the_open_time_until_then_is_what_it_needs() {
    for (name, first) in CHANGES {
        for windows in WINDOWS {
            let schedule = schedule(windows, name);
            for needed in [1, 599, 3600, 40_000].map(Duration::from_secs) {
                let end = schedule.finish(time(first), needed).expect("an end");
                assert_eq!(schedule.open_time(time(first), end), needed, "{name} {first} {windows:?}");
            }
        }
    }
}
