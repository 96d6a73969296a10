package main

import (
	"context"
	"net"
	"strconv"
	"time"

	"github.com/inetaf/tcpproxy"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// Connections of the guest's that the host has not established yet. Further ones wait: the guest asks again after a second.
	maxDialing = 64
	// Linux in the guest gives up after about two minutes, too.
	dialTimeout = 2 * time.Minute
)

// translated says what an address of the guest's network means to the host. Every other address means what it does on the host, and would for
// the gateway, were it not here.
var translated = map[tcpip.Address]tcpip.Address{address(host): address("127.0.0.1"), address(gateway): address(nowhere)}

// linkLocal is where clouds keep their machines' credentials. They are not the guest's.
var linkLocal = tcpip.AddressWithPrefix{Address: address("169.254.0.0"), PrefixLen: 16}.Subnet()

// dialer connects the guest to the host's network. It is the library's (pkg/services/forwarder) but for what that has no place for: the
// receive buffers' size, and how many addresses that do not answer keep the guest from all others.
func dialer(guest *stack.Stack, receiveBuffer int) *tcp.Forwarder {
	return tcp.NewForwarder(guest, receiveBuffer, maxDialing, func(request *tcp.ForwarderRequest) {
		server, err := dialFor(request.ID())
		if err != nil {
			request.Complete(true)
			return
		}
		var queue waiter.Queue
		endpoint, failure := request.CreateEndpoint(&queue)
		request.Complete(false)
		if failure != nil {
			_ = server.Close()
			return
		}
		proxy := tcpproxy.DialProxy{DialContext: func(context.Context, string, string) (net.Conn, error) { return server, nil }}
		proxy.HandleConn(gonet.NewTCPConn(&queue, endpoint))
	})
}

func dialFor(wanted stack.TransportEndpointID) (net.Conn, error) {
	to := wanted.LocalAddress
	if linkLocal.Contains(to) {
		return nil, &net.AddrError{Err: "link-local", Addr: to.String()}
	}
	if meant, ok := translated[to]; ok {
		to = meant
	}
	return net.DialTimeout("tcp", net.JoinHostPort(to.String(), strconv.Itoa(int(wanted.LocalPort))), dialTimeout)
}
