package isolate

import (
	"testing"
	"testing/synctest"
	"time"
)

// A run that lasts longer than it may is kicked when it is due, whatever the timer was set for before; one that is over is not.
func TestSlicer(t *testing.T) {
	type run struct{ may, lasts time.Duration }
	const ms = time.Millisecond
	for _, c := range []struct {
		name string
		runs []run
		want []time.Duration // kicks, since the first run began
	}{
		{"over in time", []run{{4 * ms, 3 * ms}}, nil},
		{"too long", []run{{4 * ms, 9 * ms}}, []time.Duration{4 * ms}},
		{"many, over in time", []run{{4 * ms, 3 * ms}, {4 * ms, 3 * ms}, {4 * ms, 3 * ms}, {4 * ms, 3 * ms}}, nil},
		{"the last of many", []run{{4 * ms, 3 * ms}, {4 * ms, 3 * ms}, {4 * ms, 9 * ms}}, []time.Duration{10 * ms}},
		{"a short one while the timer is set for a long one", []run{{64 * ms, 1 * ms}, {4 * ms, 9 * ms}}, []time.Duration{5 * ms}},
		{"a long one while the timer is set for a short one", []run{{4 * ms, 1 * ms}, {64 * ms, 80 * ms}}, []time.Duration{65 * ms}},
		{"each", []run{{4 * ms, 6 * ms}, {8 * ms, 9 * ms}, {4 * ms, 5 * ms}}, []time.Duration{4 * ms, 14 * ms, 19 * ms}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var kicks []time.Duration
				s := slicer{kick: func() { kicks = append(kicks, time.Since(start)) }}
				for _, r := range c.runs {
					s.begin(since(), r.may)
					<-time.After(r.lasts)
					synctest.Wait()
					s.end()
				}
				<-time.After(time.Second)
				synctest.Wait()
				if len(kicks) != len(c.want) {
					t.Fatalf("kicked after %v, want %v", kicks, c.want)
				}
				for n := range kicks {
					if kicks[n] != c.want[n] {
						t.Errorf("kicked after %v, want %v", kicks, c.want)
					}
				}
				if s.at.Load() != 0 {
					t.Error("the timer is set, with no run")
				}
			})
		})
	}
}

// However runs and the timer meet, none that goes on is forgotten.
func TestSlicerRace(t *testing.T) {
	kicked := make(chan struct{}, 1)
	s := slicer{kick: func() {
		select {
		case kicked <- struct{}{}:
		default:
		}
	}}
	for n := range 2000 {
		for k := range n % 50 { // short ones, while the timer fires
			s.begin(since(), time.Duration(k)*time.Microsecond)
			s.end()
		}
		select { // of one that was over when it was kicked
		case <-kicked:
		default:
		}
		s.begin(since(), time.Duration(n%7)*10*time.Microsecond)
		select {
		case <-kicked:
		case <-time.After(10 * time.Second):
			t.Fatalf("run %d was not kicked", n)
		}
		s.end()
	}
}
